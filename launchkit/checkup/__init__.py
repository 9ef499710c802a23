"""What would break here: facts about the machine in, rows with fixes out. ``launchkit.probe.facts`` gathers them."""
