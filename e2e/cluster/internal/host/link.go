package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"strings"
)

// IP runs the ip command with the words of one line.
func IP(line string) error {
	_, err := ipOutput(line)
	return err
}

func ipOutput(line string) ([]byte, error) {
	out, err := exec.Command("ip", strings.Fields(line)...).Output()
	if err != nil {
		return nil, fmt.Errorf("ip %s: %w", line, withStderr(err))
	}
	return out, nil
}

func withStderr(err error) error {
	if exit := new(exec.ExitError); errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
	}
	return err
}

// RemoveLink removes a network interface, with its peer, addresses and
// routes, where there is one.
func RemoveLink(name string) error {
	if !LinkExists(name) {
		return nil
	}
	if err := IP("link del " + name); err != nil && LinkExists(name) {
		return err
	}
	return nil
}

// LinkExists says whether there is a network interface of this name.
func LinkExists(name string) bool {
	_, err := net.InterfaceByName(name)
	return err == nil
}

// Routed says whether any route but the default one leads to an address of
// the block.
func Routed(block string) (bool, error) {
	wanted, err := netip.ParsePrefix(block)
	if err != nil {
		return false, err
	}
	out, err := ipOutput("-json -4 route show table all")
	if err != nil {
		return false, err
	}
	var routes []struct{ Dst string }
	if err := json.Unmarshal(out, &routes); err != nil {
		return false, fmt.Errorf("routes: %w", err)
	}
	for _, route := range routes {
		if address, err := netip.ParseAddr(route.Dst); err == nil {
			if wanted.Contains(address) {
				return true, nil
			}
		} else if prefix, err := netip.ParsePrefix(route.Dst); err == nil && prefix.Bits() > 0 && prefix.Overlaps(wanted) {
			return true, nil
		}
	}
	return false, nil
}
