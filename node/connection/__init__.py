"""Why a node and a researcher cannot connect: proxies, ports, certificates, looked at without Fed-BioMed's own code."""
