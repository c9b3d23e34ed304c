"""Chapter 11: every router on the same text, model and budget.

`python book/runs/router_bench.py` writes router_bench.json (15 to 20 minutes on one quiet CPU core: one worker, since it measures time).
"""

from moe_book import corpus, runs
from moe_tools.bench import routers

if __name__ == "__main__":
    record = routers.bench(workers=1, progress=print)
    print(runs.save("router_bench", text=corpus.load(), **record))
    print(routers.table(record))
