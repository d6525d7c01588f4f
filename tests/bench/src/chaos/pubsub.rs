//! C8: numbered messages through the proxies, and subscribers that write down which of them came.
//!
//! Invariant: a message whose PUBLISH was answered is missed only while an unplanned fault was on, or
//! just after it; across planned moves none is missed, none comes twice, and no subscriber's
//! connection ends. A number is published once.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::TcpStream,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    check::{Checked, Finding},
    client,
    history::now_us,
    timeline::Timeline,
};

/// Channels at each proxy: they spread over the shards.
const CHANNELS: usize = 2;
/// Between two messages of a channel.
const PACE: Duration = Duration::from_millis(50);
/// Between two attempts to subscribe.
const AGAIN: Duration = Duration::from_millis(50);
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// For an answer to SUBSCRIBE; a proxy holds it no longer than other requests.
const SUBSCRIBE_LIMIT: Duration = Duration::from_secs(8);
/// After the last message, for what is still on its way: a sender whose packets were lost for seconds
/// without a word waits for as long again before it sends them once more.
const LAST_WORDS: Duration = Duration::from_secs(12);
/// All is well when shards serve and proxies answer; proxies then still have to reach nodes for
/// messages again, and clients that were cut off to subscribe.
const AFTERMATH_US: u64 = 1_500_000;
/// Findings in the report.
const SHOWN_MAX: usize = 5;
const CHECK: &str = "C8 messages";

/// A message that was published.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sent {
    /// Sent then.
    pub from_us: u64,
    /// Answered, or given up, then.
    pub to_us: u64,
    /// Answered.
    pub acked: bool,
}

/// What one channel's subscriber saw.
#[derive(Clone, Debug, Default)]
pub struct Heard {
    /// Its name.
    pub channel: String,
    /// Numbers that came.
    pub count: u64,
    /// Numbers that did not come before a higher one did.
    pub missing: Vec<u64>,
    /// Numbers that came after the same or a higher one, and when.
    pub again: Vec<(u64, u64)>,
    /// Highest number that came.
    pub last: Option<u64>,
    /// Times without a connection: from its loss to the next subscription.
    pub away: Vec<(u64, u64)>,
}

impl Heard {
    /// A message came.
    pub fn number(&mut self, number: u64, now_us: u64) {
        self.count += 1;
        let next = self.last.map_or(0, |last| last + 1);
        if number < next {
            // One that was only late is not missing; the order is broken all the same.
            self.missing.retain(|n| *n != number);
            self.again.push((number, now_us));
            return;
        }
        self.missing.extend(next..number);
        self.last = Some(number);
    }
}

/// One channel: what was published, and what came.
#[derive(Clone, Debug, Default)]
pub struct Channel {
    /// By number.
    pub sent: Vec<Sent>,
    /// What its subscriber saw.
    pub heard: Heard,
}

impl Channel {
    /// Messages whose PUBLISH was answered.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.sent.iter().filter(|s| s.acked).count() as u64
    }

    /// A line for each run of messages that did not come, and for each time without a connection.
    #[must_use]
    pub(super) fn gaps(&self) -> Vec<String> {
        let Heard {
            channel,
            missing,
            away,
            ..
        } = &self.heard;
        let at = |number: &u64| {
            let sent = usize::try_from(*number).ok().and_then(|n| self.sent.get(n));
            sent.map_or(0, |sent| sent.from_us)
        };
        let runs = missing.chunk_by(|one, next| one + 1 == *next);
        let mut lines: Vec<String> = runs
            .filter_map(|run| Some((run.first()?, run.last()?)))
            .map(|(first, last)| {
                let (from_us, to_us) = (at(first), at(last));
                format!("{channel} missed {first} to {last}, sent at {from_us} to {to_us} us")
            })
            .collect();
        lines.extend(away.iter().map(|(from_us, to_us)| {
            format!("{channel} without a connection from {from_us} to {to_us} us")
        }));
        lines
    }
}

/// Judges all channels.
#[must_use]
pub fn judge(channels: &[Channel], timeline: &Timeline) -> (Vec<Finding>, Checked) {
    let mut findings = Vec::new();
    let (mut excused, mut messages) = (0, 0);
    let mut lost_us: Vec<(u64, u64)> = Vec::new();
    for Channel { sent, heard } in channels {
        messages += heard.count;
        let end = heard.last.map_or(0, |last| last + 1);
        let missing = heard.missing.iter().copied().chain(end..sent.len() as u64);
        for number in missing {
            let Some(message) = usize::try_from(number).ok().and_then(|n| sent.get(n)) else {
                continue;
            };
            if !message.acked {
                continue;
            }
            if timeline.is_troubled(message.from_us, message.to_us, AFTERMATH_US) {
                excused += 1;
                lost_us.push((message.from_us, message.to_us));
                continue;
            }
            let what = format!(
                "message {number} never came, sent at {} us",
                message.from_us
            );
            push(
                &mut findings,
                "C8 message missed in peace",
                true,
                heard,
                what,
            );
        }
        for (number, at_us) in &heard.again {
            let sent = usize::try_from(*number).ok().and_then(|n| sent.get(n));
            let from_us = sent.map_or(*at_us, |sent| sent.from_us);
            let broken = !timeline.is_troubled(from_us, *at_us, AFTERMATH_US);
            let what = format!("message {number} came again or late, at {at_us} us");
            push(
                &mut findings,
                "C8 message out of order",
                broken,
                heard,
                what,
            );
        }
        for (from_us, to_us) in &heard.away {
            if !timeline.is_troubled(*from_us, *from_us, AFTERMATH_US) {
                let what = format!("its connection ended at {from_us} us, again at {to_us} us");
                push(
                    &mut findings,
                    "C8 subscriber cut off in peace",
                    true,
                    heard,
                    what,
                );
            }
        }
    }
    let (alive, faults) = alive_after(channels, timeline);
    let planned = timeline.windows().iter().filter(|w| w.planned).count();
    let checked = Checked {
        check: CHECK,
        examined: messages,
        of: format!(
            "messages received on {} channels over {planned} planned moves; alive after {alive} of \
             {faults} unplanned faults that left time to see it; {excused} missed during unplanned \
             faults",
            channels.len()
        ),
    };
    (findings, checked)
}

fn push(
    findings: &mut Vec<Finding>,
    check: &'static str,
    broken: bool,
    heard: &Heard,
    what: String,
) {
    let alike = findings
        .iter()
        .filter(|f| f.check == check && f.broken == broken);
    if alike.count() < SHOWN_MAX {
        findings.push(Finding {
            check,
            broken,
            what: format!("{}: {what}", heard.channel),
            count: 1,
        });
    }
}

/// After how many unplanned faults a message of the calm came, and how many had a calm.
fn alive_after(channels: &[Channel], timeline: &Timeline) -> (usize, usize) {
    let windows = timeline.windows();
    let (mut alive, mut faults) = (0, 0);
    for (index, window) in windows.iter().enumerate().filter(|(_, w)| !w.planned) {
        let from_us = window.well_us.saturating_add(AFTERMATH_US);
        let to_us = windows.get(index + 1).map_or(u64::MAX, |next| next.from_us);
        let came = |channel: &Channel| {
            let calm = channel
                .sent
                .iter()
                .enumerate()
                .filter(|(_, sent)| sent.acked && sent.from_us > from_us && sent.to_us < to_us);
            let missing = &channel.heard.missing;
            let end = channel.heard.last.map_or(0, |last| last + 1);
            let mut calm = calm.map(|(n, _)| n as u64).peekable();
            calm.peek()
                .is_some()
                .then(|| calm.any(|n| n < end && missing.binary_search(&n).is_err()))
        };
        let each: Vec<bool> = channels.iter().filter_map(came).collect();
        if !each.is_empty() {
            faults += 1;
            alive += usize::from(each.iter().all(|came| *came));
        }
    }
    (alive, faults)
}

/// Publishers and subscribers of a run.
#[derive(Debug)]
pub(super) struct Audience {
    channels: Vec<Arc<Mutex<Channel>>>,
    publish: CancellationToken,
    listen: CancellationToken,
    tasks: JoinSet<()>,
}

impl Audience {
    /// Subscribes to every channel, and publishes to each through another proxy.
    ///
    /// # Errors
    /// When a subscription can't be made although nothing is wrong yet.
    pub(super) async fn start(proxies: &[String]) -> anyhow::Result<Self> {
        let mut audience = Self {
            channels: Vec::new(),
            publish: CancellationToken::new(),
            listen: CancellationToken::new(),
            tasks: JoinSet::new(),
        };
        for (index, proxy) in proxies.iter().enumerate() {
            for channel in 0..CHANNELS {
                let name = format!("news-{index}-{channel}");
                let first = subscribe(proxy, &name).await;
                let first = first.with_context(|| format!("subscribe at {proxy}"))?;
                let shared = Arc::new(Mutex::new(Channel {
                    heard: Heard {
                        channel: name.clone(),
                        ..Heard::default()
                    },
                    ..Channel::default()
                }));
                audience.channels.push(shared.clone());
                let stop = audience.listen.clone();
                let place = (proxy.clone(), name.clone());
                audience
                    .tasks
                    .spawn(listen(place, first, shared.clone(), stop));
                let other = proxies[(index + 1) % proxies.len()].clone();
                let stop = audience.publish.clone();
                audience.tasks.spawn(publish((other, name), shared, stop));
            }
        }
        Ok(audience)
    }

    /// Ends, and gives what was sent and what came.
    pub(super) async fn end(mut self) -> Vec<Channel> {
        self.publish.cancel();
        sleep(LAST_WORDS).await;
        self.listen.cancel();
        while self.tasks.join_next().await.is_some() {}
        let all = self.channels.iter();
        all.map(|channel| std::mem::take(&mut *lock(channel)))
            .collect()
    }
}

fn lock(channel: &Mutex<Channel>) -> std::sync::MutexGuard<'_, Channel> {
    channel.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn publish(
    (proxy, name): (String, String),
    channel: Arc<Mutex<Channel>>,
    stop: CancellationToken,
) {
    let mut connection = None;
    while timeout(PACE, stop.cancelled()).await.is_err() {
        let mut open = match connection.take() {
            Some(open) => open,
            None => match client::connect(&proxy).await {
                Ok(open) => open,
                Err(_) => continue,
            },
        };
        let number = lock(&channel).sent.len();
        let from_us = now_us();
        let message = redis::cmd("PUBLISH").arg(&name).arg(number).to_owned();
        let answer = message.query_async::<u64>(&mut open).await;
        let sent = Sent {
            from_us,
            to_us: now_us(),
            acked: answer.is_ok(),
        };
        lock(&channel).sent.push(sent);
        if sent.acked {
            connection = Some(open);
        }
    }
}

async fn subscribe(proxy: &str, name: &str) -> anyhow::Result<BufReader<TcpStream>> {
    let stream = timeout(CONNECT_LIMIT, TcpStream::connect(proxy)).await??;
    let mut stream = BufReader::new(stream);
    let ask = format!("SUBSCRIBE {name}\r\n");
    stream.write_all(ask.as_bytes()).await?;
    timeout(SUBSCRIBE_LIMIT, async {
        // *3, $9, subscribe, $n, the channel, :1
        let mut line = String::new();
        for _ in 0..6 {
            line.clear();
            let read = stream.read_line(&mut line).await?;
            anyhow::ensure!(read > 0 && !line.starts_with('-'), "refused: {line}");
        }
        Ok(())
    })
    .await??;
    Ok(stream)
}

async fn listen(
    (proxy, name): (String, String),
    first: BufReader<TcpStream>,
    channel: Arc<Mutex<Channel>>,
    stop: CancellationToken,
) {
    let mut stream = Some(first);
    let mut lost_us = None;
    while !stop.is_cancelled() {
        let open = match stream.take() {
            Some(open) => Ok(open),
            None => subscribe(&proxy, &name).await,
        };
        let Ok(open) = open else {
            let _ = timeout(AGAIN, stop.cancelled()).await;
            continue;
        };
        if let Some(lost_us) = lost_us.take() {
            lock(&channel).heard.away.push((lost_us, now_us()));
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = numbers(open, &channel) => lost_us = Some(now_us()),
        }
    }
    if let Some(lost_us) = lost_us {
        lock(&channel).heard.away.push((lost_us, u64::MAX));
    }
}

/// Takes messages to the end of the connection.
async fn numbers(mut stream: BufReader<TcpStream>, channel: &Mutex<Channel>) {
    let mut line = String::new();
    loop {
        // *3, $7, message, $n, the channel, $n, the number
        for _ in 0..7 {
            line.clear();
            match stream.read_line(&mut line).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        let Ok(number) = line.trim_end().parse() else {
            return;
        };
        lock(channel).heard.number(number, now_us());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::timeline::Window;

    const SECOND: u64 = 1_000_000;

    /// One message a second, and these came.
    fn channel(count: u64, came: &[u64]) -> Channel {
        let sent = |n: u64| Sent {
            from_us: n * SECOND,
            to_us: n * SECOND + 10,
            acked: true,
        };
        let mut heard = Heard::default();
        for number in came {
            heard.number(*number, number * SECOND + 20);
        }
        Channel {
            sent: (0..count).map(sent).collect(),
            heard,
        }
    }

    fn window(planned: bool, from: u64, well: u64) -> Window {
        Window {
            kind: "x".into(),
            planned,
            from_us: from * SECOND,
            well_us: well * SECOND,
        }
    }

    fn broken(channel: Channel, windows: Vec<Window>) -> Vec<&'static str> {
        let (findings, _) = judge(&[channel], &Timeline::of(windows));
        let broken = findings.iter().filter(|f| f.broken);
        broken.map(|f| f.check).collect()
    }

    #[test]
    fn a_gap_is_allowed_in_an_unplanned_fault_and_nowhere_else() {
        let gap = || channel(8, &[0, 1, 2, 5, 6, 7]);
        assert!(broken(gap(), vec![window(false, 3, 4)]).is_empty());
        let missed = "C8 message missed in peace";
        assert_eq!(broken(gap(), vec![window(true, 3, 4)]), [missed; 2]);
        assert_eq!(broken(gap(), vec![]), [missed; 2]);
        // The end never came.
        assert_eq!(broken(channel(4, &[0, 1, 2]), vec![]), [missed]);
        let mut unknown = gap();
        unknown.sent[3].acked = false;
        unknown.sent[4].acked = false;
        assert!(broken(unknown, vec![]).is_empty());
    }

    #[test]
    fn what_comes_twice_or_late_is_found() {
        let twice = channel(4, &[0, 1, 1, 2, 3]);
        assert_eq!(
            broken(twice, vec![window(true, 0, 3)]),
            ["C8 message out of order"]
        );
        let late = channel(4, &[0, 2, 1, 3]);
        assert_eq!(broken(late, vec![]), ["C8 message out of order"]);
    }

    #[test]
    fn a_subscriber_is_cut_off_by_an_unplanned_fault_only() {
        let mut cut = channel(4, &[0, 1, 2, 3]);
        cut.heard.away.push((2 * SECOND, 3 * SECOND));
        let found = broken(cut.clone(), vec![window(true, 1, 3)]);
        assert_eq!(found, ["C8 subscriber cut off in peace"]);
        assert!(broken(cut, vec![window(false, 1, 3)]).is_empty());
    }

    #[test]
    fn life_after_a_fault_is_counted_where_there_was_time_to_see_it() {
        let windows = vec![
            window(false, 1, 2),
            window(false, 6, 7),
            window(false, 8, 9),
        ];
        let timeline = Timeline::of(windows);
        let dead_after_the_second = channel(20, &[0, 1, 2, 3, 4, 5, 6]);
        let (_, checked) = judge(&[dead_after_the_second], &timeline);
        assert!(checked.of.contains("alive after 1 of 2"), "{}", checked.of);
        assert_eq!(checked.examined, 7);
    }
}
