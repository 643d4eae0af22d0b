//! Of the process itself, on every page.

use crate::declaration::Metric;

const CPU: Metric =
    Metric::counter("process_cpu_seconds_total", "seconds", "Processor time, user and system.");
const OPEN_FDS: Metric = Metric::gauge("process_open_fds", "file descriptors", "Open file descriptors.");
const MAX_FDS: Metric =
    Metric::gauge("process_max_fds", "file descriptors", "File descriptors there may be.");
const VIRTUAL: Metric = Metric::gauge("process_virtual_memory_bytes", "bytes", "Virtual memory.");
const RESIDENT: Metric = Metric::gauge("process_resident_memory_bytes", "bytes", "Resident memory.");
const START: Metric =
    Metric::gauge("process_start_time_seconds", "seconds", "When the process started, since 1970.");
const THREADS: Metric = Metric::gauge("process_threads", "threads", "Threads of the operating system.");

/// All of them.
pub const METRICS: &[&Metric] = &[&CPU, &OPEN_FDS, &MAX_FDS, &VIRTUAL, &RESIDENT, &START, &THREADS];
