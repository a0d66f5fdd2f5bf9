from msconv.cli import main

main()
