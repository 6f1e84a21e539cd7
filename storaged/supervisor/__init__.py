"""One actor per volume: observe, plan, do one step, observe."""
