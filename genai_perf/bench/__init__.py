"""The harness as a library: paired timing, memory in fresh processes, quality, machine, reports."""
