module attune.dev/devcluster/tools/pause

go 1.26.0
