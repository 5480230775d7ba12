"""Why does the tree look as it does?  `explain` replays a lookup, `text` shows it to people."""
