"""What pyproject.toml cannot say: which folders are packages. The stored runs travel along, because on Colab there is no book/ beside them."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["moe_core", "moe_core.*", "moe_tools", "moe_tools.*"]),
        *find_packages("book", include=["moe_book", "moe_book.*"]),
        "moe_book.stored_runs",
    ],
    package_dir={"moe_book": "book/moe_book", "moe_book.stored_runs": "book/runs"},
    package_data={
        "moe_book": ["**/*.js", "**/*.css", "**/*.json"],
        "moe_book.stored_runs": ["*.json"],
    },
    exclude_package_data={"moe_book.stored_runs": ["*.py"]},
)
