package instance

import (
	"net/netip"
	"strings"
	"testing"
)

func TestFindRefusesNamesThatDoNotFitALink(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", "/somewhere/.cache")
	for name, want := range map[string]bool{
		"herd": true, "a": true, "a-1": true, "twelve-chars": true,
		"": false, "1a": false, "a-": false, "A": false, "a/b": false, "..": false, "thirteen-char": false,
	} {
		of, err := Find(name)
		if (err == nil) != want {
			t.Errorf("name %q: %v", name, err)
		}
		if err == nil && len(of.Link()) > 15 {
			t.Errorf("link %q is longer than the kernel takes", of.Link())
		}
	}
}

func TestFindRefusesFoldersThatANodeCannotSee(t *testing.T) {
	for dir, why := range map[string]string{
		"/var/lib/someone/.cache":      "is another one inside a node",
		"/" + strings.Repeat("x", 100): "too long",
	} {
		t.Setenv("XDG_CACHE_HOME", dir)
		if _, err := Find("herd"); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("cache in %s: %v, want %q", dir, err, why)
		}
	}
}

func TestNetworkParts(t *testing.T) {
	for n := range Network(Networks) {
		block := netip.MustParsePrefix(n.Block())
		parts := []netip.Prefix{netip.MustParsePrefix(n.Services()), netip.MustParsePrefix(n.Host() + "/30")}
		for k := 1; k <= 9; k++ {
			pods := netip.MustParsePrefix(n.NodePods(k))
			if !netip.MustParsePrefix(n.Pods()).Overlaps(pods) {
				t.Errorf("pods of node %d, %s, are not in %s", k, pods, n.Pods())
			}
			parts = append(parts, pods)
		}
		for i, part := range parts {
			if !block.Overlaps(part) {
				t.Errorf("%s is not in %s", part, block)
			}
			for _, other := range parts[i+1:] {
				if part.Overlaps(other) {
					t.Errorf("%s and %s overlap", part, other)
				}
			}
		}
	}
}
