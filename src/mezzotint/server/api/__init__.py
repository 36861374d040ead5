"""The only room that knows HTTP: dialects, authentication of a call, answers, and the playground."""
