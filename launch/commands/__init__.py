"""The functions behind the commands of `spresso`; `launch.cli` imports a module when its command is called."""
