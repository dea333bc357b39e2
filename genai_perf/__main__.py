"""python -m genai_perf: the same as the command genaiperf."""

from .cli import main

main()
