"""python -m moe_tools.pretrain, alone or under torchrun."""

import os
import sys

import torch.distributed as dist

from .heartbeat import Heartbeat
from .pretrain_config import PretrainConfig, from_command_line
from .trainer import Diverged
from .training_run import RankLost, init_process_group, pretrain


def main() -> int:
    """Exit status 0, 1 where nothing fits, 2 where an option is wrong; errors are a line."""
    config, resume = from_command_line()
    try:
        pretrain(config, resume=resume, heartbeat=_join(config))
        return 0
    except (RankLost, Diverged, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RankLost):
            os._exit(1)  # closing the group would wait for the lost rank
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join(config: PretrainConfig) -> Heartbeat | None:
    """Meet the other processes that torchrun started; None in a process of its own."""
    if "RANK" not in os.environ:
        return None
    missing = {"WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} - set(os.environ)
    if missing:
        raise ValueError(
            f"RANK is set in the environment, but not {', '.join(sorted(missing))}: start the run "
            "with torchrun, or unset RANK"
        )
    return init_process_group(config)


if __name__ == "__main__":
    sys.exit(main())
