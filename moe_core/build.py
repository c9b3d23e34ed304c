"""From the names and numbers of an ``MoEConfig`` to a router: the defaults of a router's class, and the check that it knows every option."""

from inspect import Parameter, signature

from .routers import ROUTERS, Router

# Fields of MoEConfig that some routers have no use for -> the value that asks for nothing.
_SHARED_OPTIONS = {
    "capacity_factor": None,
    "norm_topk_prob": None,
    "aux_loss_weight": 0.0,
    "z_loss_weight": 0.0,
    "jitter_noise": 0.0,
}
_FIELDS = ("d_model", "n_experts", "top_k", "expansion", *_SHARED_OPTIONS)


def top_k_is_a_mean(name: str) -> bool:
    """True for a router whose tokens may take any number of experts: K is then their mean number, and may be a fraction."""
    return "expansion" in signature(ROUTERS[name]).parameters


def shared_defaults(name: str) -> dict:
    """What the fields of MoEConfig that several routers share are for this one, when nobody says anything."""
    parameters = signature(ROUTERS[name]).parameters
    return {
        field: parameters[field].default if field in parameters else nothing
        for field, nothing in _SHARED_OPTIONS.items()
    }


def build(config) -> Router:
    """The router that a config names.

    d_model, n_experts, top_k and the options that several routers share (capacity_factor, norm_topk_prob, aux_loss_weight,
    z_loss_weight, jitter_noise) come from the config's own fields, everything else from ``config.router_options``. Routers whose
    tokens may take any number of experts get the config's top_k as their ``expansion``.

    Raises:
        ValueError: the router has no such option, one it needs is missing, or a value is out of its range.
    """
    cls = ROUTERS[config.router]
    parameters = signature(cls).parameters
    own = [name for name in parameters if name not in _FIELDS]
    for name in config.router_options:
        if name in _FIELDS:
            field = "top_k" if name == "expansion" else name
            raise ValueError(f"router_options[{name!r}]: give it as the field {field} of MoEConfig")
        if name not in own:
            has = f"it has {', '.join(own)}" if own else "it has none"
            raise ValueError(
                f"router_options[{name!r}]: router={config.router!r} has no such option; {has}"
            )
    options = dict(config.router_options)
    for name, nothing in _SHARED_OPTIONS.items():
        value = getattr(config, name)
        if name in parameters:
            options[name] = value
        elif value != nothing:
            raise ValueError(
                f"{name}={value!r} must be {nothing!r}: router={config.router!r} has no such option"
            )
    if "top_k" in parameters:
        options["top_k"] = config.top_k
    elif "expansion" in parameters:
        options["expansion"] = float(config.top_k)
    for name in own:
        if parameters[name].default is Parameter.empty and name not in options:
            raise ValueError(f"router={config.router!r} needs router_options[{name!r}]")
    router = cls(config.d_model, config.n_experts, **options)
    if not {"top_k", "expansion"} & set(parameters) and config.top_k != router.top_k:
        raise ValueError(
            f"top_k={config.top_k!r} must be {router.top_k}: router={config.router!r} has no other"
        )
    return router
