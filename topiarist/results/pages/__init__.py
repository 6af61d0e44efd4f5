"""Things to look at: the page and the model card of a result, and one page over several results.

refresh("OUT")                                          # pruning_report.html and README.md again, with what is measured
compare_page([Result.from_folder(d) for d in folders])   # quality against size and speed
"""

from topiarist.results.pages.card import measured, model_card
from topiarist.results.pages.render import compare_page, report_page
from topiarist.results.pages.result import PAGE, Result
from topiarist.results.pages.saved import refresh, save_benchmark, save_evaluation

__all__ = [
    "PAGE",
    "Result",
    "compare_page",
    "measured",
    "model_card",
    "refresh",
    "report_page",
    "save_benchmark",
    "save_evaluation",
]
