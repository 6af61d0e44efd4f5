"""beartype as type checkers read annotations: an int is good where a float is asked for (PEP 484's numeric tower)."""

from beartype import BeartypeConf, beartype

tower = beartype(conf=BeartypeConf(is_pep484_tower=True))
