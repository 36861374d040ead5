"""How many workers a load needs: the server's own scheduling under a clock that leaps over waiting."""
