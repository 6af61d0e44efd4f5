"""Pages: of a result, and one over several results.

refresh("OUT")                                          # pruning_report.html and README.md again, with what is measured
compare_page([Result.from_folder(d) for d in folders])   # quality against size and speed
"""

from topiarist.results.pages.render import MARK, compare_page, report_page
from topiarist.results.result import PAGE, Result
from topiarist.results.saved import refresh, save_benchmark, save_evaluation

__all__ = [
    "MARK",
    "PAGE",
    "Result",
    "compare_page",
    "refresh",
    "report_page",
    "save_benchmark",
    "save_evaluation",
]
