"""The preparation as an Apache Beam pipeline, for logs larger than one machine (extra `beam`)."""
