"""All computation, usable from a notebook: no Ray, no command-line flags, no printing.

The top level holds what every room needs: errors, records, json_record, settings, hashing, layout, metrics,
profile, schedules. A room imports only rooms listed before it; the last four do not import each other, except that
baselines import relearning.

storage      access to objects: local folders and buckets, retries, conditional writes
pictures     one picture: formats, decoding and encoding, metadata, finding it among a sample's members, augmentation
shards       inputs by URL, reading and writing of tars and loose images, square crops of samples
surrogates   pretrained encoders, their weights and their features
clusters     clustering of features: the space, k-means, target clusters
deltas       what is added to pictures, what makes it, the protection file, and applying it
fitting      fitting deltas and proxies to a collection
measures     what a protection does to pictures, verification of an output, estimates for a dry run
runs         records of a run: settings, commits, totals, and whether it may start
packing      data sets as they are published -> shards, and back
report       a run's report page, and what all report pages share
one_for_all  One for All (14A): training a universal generator
relearning   what a model can still learn: targets, regimes, labels, denoisers, report and certificate
uploads      new uploads, protected unit by unit, each object once
baselines    protections that others have published: from labelled pictures to deltas
"""
