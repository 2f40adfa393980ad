package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// A tunnel carries TCP between two network namespaces, whose processes share nothing but the file system: a Unix socket.
//
//	tunnel in HOST:PORT SOCKET PORT   what connects to HOST:PORT reaches 127.0.0.1:PORT of the other side
//	tunnel in HOST:PORT SOCKET        the same for redirected connections, to the port that each was made for
//	tunnel out SOCKET                 the other side
//
// Each connection through the socket begins with the port as two bytes.
func tunnel(arguments []string) error {
	switch {
	case len(arguments) == 2 && arguments[0] == "out":
		// The socket of an earlier process that was killed.
		if err := os.Remove(arguments[1]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return serve("unix", arguments[1], leave)
	case len(arguments) == 3 && arguments[0] == "in":
		return serve("tcp4", arguments[1], func(from net.Conn) error { return enter(from, arguments[2], originalPort) })
	case len(arguments) == 4 && arguments[0] == "in":
		port, err := strconv.ParseUint(arguments[3], 10, 16)
		if err != nil {
			return err
		}
		fixed := func(net.Conn) (uint16, error) { return uint16(port), nil }
		return serve("tcp4", arguments[1], func(from net.Conn) error { return enter(from, arguments[2], fixed) })
	}
	return errors.New("usage: tunnel in HOST:PORT SOCKET [PORT] | tunnel out SOCKET")
}

func serve(network, address string, handle func(net.Conn) error) error {
	listener, err := net.Listen(network, address)
	if err != nil {
		return err
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := handle(connection); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
		}()
	}
}

func enter(from net.Conn, socket string, portOf func(net.Conn) (uint16, error)) error {
	defer from.Close()
	port, err := portOf(from)
	if err != nil {
		return err
	}
	to, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer to.Close()
	if err := binary.Write(to, binary.BigEndian, port); err != nil {
		return err
	}
	join(from, to)
	return nil
}

func leave(from net.Conn) error {
	defer from.Close()
	var port uint16
	if err := binary.Read(from, binary.BigEndian, &port); err != nil {
		return err
	}
	to, err := net.Dial("tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	defer to.Close()
	join(from, to)
	return nil
}

// The end of one direction is passed on as such, and does not end the other.
func join(a, b net.Conn) {
	var both sync.WaitGroup
	for _, ends := range [][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			// A broken connection ends both directions; a clean end only this one.
			if _, err := io.Copy(ends[1], ends[0]); err != nil {
				a.Close()
				b.Close()
				return
			}
			ends[1].(interface{ CloseWrite() error }).CloseWrite()
		})
	}
	both.Wait()
}

// The port a connection was made for before netfilter redirected it here.
func originalPort(connection net.Conn) (port uint16, err error) {
	raw, err := connection.(*net.TCPConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	controlErr := raw.Control(func(descriptor uintptr) {
		// The kernel answers with a sockaddr_in: 16 bytes, the port in the second two. This call has room for as many.
		var address *unix.IPv6Mreq
		if address, err = unix.GetsockoptIPv6Mreq(int(descriptor), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); err == nil {
			port = binary.BigEndian.Uint16(address.Multiaddr[2:4])
		}
	})
	return port, errors.Join(err, controlErr)
}
