"""Stand-in for a 0731 or 0813 release; never imported."""

raise SystemExit("an encoding file must not be executed")

RULE = "Follow it:\n"
response_format_template: str = "## Response Format:\n\n" + RULE + "{schema}"
REASONING_EFFORT_PROMPTS: dict[str, str] = {
    "low": "",
    "high": "Effort: all of it.\n\n",
    "max": ("Effort: more than all.\nTwo literals.\n\n"),
}
DEFAULT_REASONING_EFFORT = "low"

TOOLS_TEMPLATE = """## Tools

Call with <{dsml_token}tool_calls>, think in {thinking_start_token}..{thinking_end_token}; {{literal}} braces.

{tool_schemas}

End.
"""
