package tools

import (
	"os"
	"testing"
)

func TestBuiltBuildsNothing(t *testing.T) {
	cache := t.TempDir()
	builder := Builder{Sources: "../../tools", Cache: cache}
	dir, built, err := builder.Built("pause")
	if err != nil || built {
		t.Fatalf("in an empty cache: %v, %v", built, err)
	}
	if entries, err := os.ReadDir(cache); err != nil || len(entries) > 0 {
		t.Fatalf("the cache has %v: %v", entries, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if again, built, err := builder.Built("pause"); err != nil || !built || again != dir {
		t.Fatalf("in a cache that has it: %s, %v, %v", again, built, err)
	}
	if _, _, err := builder.Built("nothing"); err == nil {
		t.Fatal("a tool that there is not")
	}
}
