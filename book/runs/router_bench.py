"""Chapter 11: every router on the same text, model and budget.

`python book/runs/router_bench.py` writes router_bench.json (10 to 15 minutes, 2 cores).
"""

from moe_book import corpus, runs
from moe_tools.bench import routers

if __name__ == "__main__":
    record = routers.bench(workers=2, progress=print)
    print(runs.save("router_bench", text=corpus.load(), **record))
    print(routers.table(record))
