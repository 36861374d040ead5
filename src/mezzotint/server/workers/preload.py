"""What the forkserver imports before it forks the first worker; nothing else may import this.

A forked child would run the server's main script once more, for the sake of objects pickled from it. Workers
are handed a string and skip that: a restart costs hundredths of a second, not the command line's imports.
"""

from multiprocessing import spawn

setattr(spawn, "_fixup_main_from_path", lambda path: None)  # noqa: B010
