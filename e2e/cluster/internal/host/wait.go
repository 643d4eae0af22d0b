package host

import (
	"fmt"
	"time"
)

const pollInterval = 50 * time.Millisecond

// WaitFor polls a condition until it holds, fails or the deadline passes.
func WaitFor(deadline time.Duration, what string, holds func() (bool, error)) error {
	end := time.Now().Add(deadline)
	for {
		ok, err := holds()
		if err != nil {
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("waited %s for %s", deadline, what)
		}
		time.Sleep(pollInterval)
	}
}
