//! CPU time from /proc, in units fine enough for one short measurement.

use std::fs;
use std::time::Duration;

use anyhow::Context;

/// Length of the ticks in /proc/stat: USER_HZ is 100 on every architecture of ours.
const TICK: Duration = Duration::from_millis(10);

/// CPU time of all threads of a process that run now, to the nanosecond.
pub(crate) fn of_process(pid: u32) -> anyhow::Result<Duration> {
    let tasks = format!("/proc/{pid}/task");
    let mut spent = Duration::ZERO;
    for task in fs::read_dir(&tasks).with_context(|| format!("read {tasks}"))? {
        let path = task?.path().join("schedstat");
        // A thread may end while its siblings are counted.
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        spent += Duration::from_nanos(running_ns(&text).with_context(|| format!("read {path:?}"))?);
    }
    Ok(spent)
}

/// CPU time of the whole machine that was not idle, the kernel's network work included.
pub(crate) fn of_host() -> anyhow::Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let ticks = busy_ticks(&text).context("read the first line of /proc/stat")?;
    Ok(TICK * ticks)
}

/// The first of three numbers: time spent running.
fn running_ns(schedstat: &str) -> Option<u64> {
    schedstat.split_ascii_whitespace().next()?.parse().ok()
}

/// user, nice and system, then (after idle and iowait) irq and softirq.
fn busy_ticks(stat: &str) -> Option<u32> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = line
        .split_ascii_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()
        .ok()?;
    let busy: u64 = [0, 1, 2, 5, 6]
        .iter()
        .map(|&at| ticks.get(at).copied().unwrap_or(0))
        .sum();
    u32::try_from(busy).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_time_is_not_busy() {
        assert_eq!(
            busy_ticks("cpu  1 20 300 9999 9999 4000 50000 9 9 9\ncpu0 1\n"),
            Some(54321)
        );
        assert_eq!(busy_ticks("intr 1"), None);
    }

    #[test]
    fn a_process_that_works_is_seen_to_work() {
        let pid = std::process::id();
        let before = of_process(pid).unwrap();
        // The kernel counts in hundredths of a second, and other programs may have the processor.
        let began = std::time::Instant::now();
        let mut sum = 0_u64;
        while of_process(pid).unwrap() <= before {
            assert!(began.elapsed().as_secs() < 30, "nothing seen in 30 s");
            for number in 0..100_000_u64 {
                sum = std::hint::black_box(sum.wrapping_add(number));
            }
        }
    }
}
