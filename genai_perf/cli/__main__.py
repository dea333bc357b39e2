"""python -m genai_perf.cli: the same as the command genaiperf."""

from . import main

main()
