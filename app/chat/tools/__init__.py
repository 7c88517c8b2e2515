"""How families of models write tool calls: a module each, with the marks that are control tokens, and a parser."""
