package boot

import (
	"fmt"
	"os"
)

// gateFile is the descriptor on which a new namespace's first process waits
// until its parent has recorded it and given it its link. If the parent ends
// before that, so does the process.
const gateFile = 3

func awaitGate() error {
	file := os.NewFile(gateFile, "gate")
	defer file.Close()
	if n, err := file.Read(make([]byte, 1)); n != 1 {
		return fmt.Errorf("the parent ended before its word: %w", err)
	}
	return nil
}

// gate is the parent's side.
type gate struct{ read, write *os.File }

func newGate() (gate, error) {
	read, write, err := os.Pipe()
	return gate{read, write}, err
}

func (g gate) open() error {
	_, err := g.write.Write([]byte{1})
	return err
}

// close lets a process that was never given the word end.
func (g gate) close() {
	g.read.Close()
	g.write.Close()
}
