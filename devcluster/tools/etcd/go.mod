module attune.dev/devcluster/tools/etcd

go 1.26.0
