# shellcheck shell=sh
# The first process of the node: makes its namespaces a machine of their own, then keeps them.
#   node.sh DIRECTORY PAUSE NODE_ADDRESS HOST_ADDRESS TUNNEL_PORT
set -eu
directory=$1 pause=$2 node_address=$3 host_address=$4 tunnel_port=$5

# The host's /proc, still: it knows this process by the host's id.
read -r pid _ </proc/self/stat
mount -t proc proc /proc
# What kubelet, containerd and CNI keep in fixed places.
mkdir -p "$directory/node/lib" "$directory/node/log"
mount --bind "$directory/node/lib" /var/lib
mount --bind "$directory/node/log" /var/log
mount -t tmpfs tmpfs /run
mkdir -p /run/lock /run/containerd
# Where the kubelet's statistics look for it.
ln -s "$directory/containerd.sock" /run/containerd/containerd.sock

# The kubelet sets these, which are the whole machine's: let it set copies.
for setting in kernel/panic kernel/panic_on_oops kernel/keys/root_maxbytes kernel/keys/root_maxkeys vm/overcommit_memory vm/panic_on_oom; do
  mkdir -p "/run/sysctl/${setting%/*}"
  cat "/proc/sys/$setting" >"/run/sysctl/$setting"
  mount --bind "/run/sysctl/$setting" "/proc/sys/$setting"
done

ip link set lo up
ip link add node0 type bridge
ip addr add "$node_address/24" dev node0
ip link set node0 up
# Addresses of services are routed before they are translated; the route itself leads nowhere.
ip route add default dev node0
echo 1 >/proc/sys/net/ipv4/ip_forward

# What is sent to the host goes into the tunnel, whatever the port; before kube-proxy looks at it (-100).
nft -f - <<RULES
table ip birb-nest {
  chain from-pods {
    type nat hook prerouting priority -110
    ip daddr $host_address tcp dport 1-65535 redirect to :$tunnel_port
  }
  chain from-node {
    type nat hook output priority -110
    ip daddr $host_address tcp dport 1-65535 redirect to :$tunnel_port
  }
}
RULES

echo "node $pid"
exec "$pause"
