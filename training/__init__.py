"""How the built-in emoji model was made, step by step; never imported by the server."""
