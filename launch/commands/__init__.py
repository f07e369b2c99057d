"""What each command of `spresso` does with its options; `launch.cli` imports a module when its command is called."""
