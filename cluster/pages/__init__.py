"""Pages over the record, for people: jobs, a job, its completions, the system, questions in SQL.

`routes.py` puts the rooms together; `showing.py` makes HTML of templates, on the server or as one file to keep,
`forms.py` reads what a page sends, `static.py` serves scripts and styles. Then one room a noun.
"""
