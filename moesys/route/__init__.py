"""Which experts the tokens of a text visit, in a checkpoint of a run."""
