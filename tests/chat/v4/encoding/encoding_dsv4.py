"""Stand-in for a V4 release; never imported."""

import os

raise SystemExit("an encoding file must not be executed")

dsml_token: str = "｜DSML｜"
response_format_template: str = "## Response Format:\n\nFollow it:\n{schema}"
REASONING_EFFORT_MAX = "Effort: all of it.\nTwo literals.\n\n"

TOOLS_TEMPLATE = """## Tools

Call with <{dsml_token}tool_calls>, think in {thinking_start_token}..{thinking_end_token}; {{literal}} braces.

{tool_schemas}

End.
"""

HOME = os.environ.get("HOME")
