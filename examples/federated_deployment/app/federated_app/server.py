"""What runs at the SuperLink: CMDStrategy around Flower's FedAvg, and files with the results."""

from cmd_plugin.jobs.federated import make_server_app

app = make_server_app()
