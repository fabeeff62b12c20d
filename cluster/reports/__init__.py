"""What a job found, for people: on the terminal, as one HTML page, as JSON and as a table.

`build.build_report` reads the record; everything else here works on the `JobReport` it returns.
"""
