"""``python -m moe_core.routers`` prints how published routers differ, as measured."""

from .differences import markdown

print(markdown())
