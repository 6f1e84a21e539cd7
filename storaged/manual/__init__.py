"""The man pages, made from what the program itself knows: its parser, its configuration's keys, its backends."""
