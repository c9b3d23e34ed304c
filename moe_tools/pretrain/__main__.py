"""python -m moe_tools.pretrain, alone or under torchrun."""

import os
import sys

import torch.distributed as dist

from .pretrain_config import from_command_line
from .training_run import RankLost, init_process_group, pretrain


def main() -> int:
    """Exit status 0, 1 where nothing fits, 2 where an option is wrong; errors are a line."""
    config, resume = from_command_line()
    heartbeat = init_process_group(config) if "RANK" in os.environ else None
    try:
        pretrain(config, resume=resume, heartbeat=heartbeat)
        return 0
    except (RankLost, ValueError, FileExistsError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RankLost):
            os._exit(1)  # closing the group would wait for the lost rank
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
