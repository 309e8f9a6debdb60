"""What main.py and bakllama.py are made of, a room for each stage of a merge.

    problems <- arithmetic <- recipes <- models <- plans <- runs

recipes say what is asked, models what is there, plans what will be done, runs do it. A room imports
only from those before it.
"""
