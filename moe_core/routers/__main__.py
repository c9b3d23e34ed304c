"""``python -m moe_core.routers`` prints how published routers differ, as ``moe_tools`` measures."""

from importlib import import_module

print(import_module("moe_tools.router_differences").markdown())
