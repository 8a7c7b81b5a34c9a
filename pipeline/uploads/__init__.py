"""New uploads: what is new below a prefix, protected unit by unit with a fitted protection, each object once.

names         which objects are images or shards, what they are called in the output, which names are refused
settings      what a user may choose
listing       listing - ledger: what is new, settled and worth an attempt
units         groups of new objects that are protected and committed together
deltas        a protection's file -> whatever answers: which deltas for these pictures?
transaction   one unit -> its objects in the output and its commit
ledger        what was done with every object: unit commits, and the sorted segments they are compacted into
segments      rows of the ledger <-> Parquet
lease         one run at a time below an output
origin        whose output this is: the input, the protection and the settings that made it
summary       what a run did
"""
