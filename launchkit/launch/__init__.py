"""From a plan's candidate to the command that runs it: pure values, nothing is started here."""
