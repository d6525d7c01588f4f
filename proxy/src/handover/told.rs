//! How a client's connections to nodes are told: to and from the messages.
//!
//! Invariant: what is read back is what was told; what cannot be read makes the client stay.

use slotmesh_proto::handover::v1 as pb;
use slotmesh_resp::Protocol;

use crate::core::line::LooseLine;
use crate::core::passing_lines::{LooseWait, LooseWatch, Pins};

fn line(line: &LooseLine) -> pb::Line {
    pb::Line {
        shard_id: line.shard_id.clone(),
        epoch: line.epoch,
        database: u32::from(line.db),
        resp3: line.protocol == Protocol::Resp3,
        own_replies: line.own_replies,
        node_id: line.node_id.unwrap_or(0),
        input: line.input.clone(),
        output: line.output.clone(),
    }
}

pub(super) fn watch(watch: &LooseWatch) -> pb::Watch {
    pb::Watch {
        shard_id: watch.shard_id.clone(),
        line: watch.line.as_ref().map(line),
    }
}

pub(super) fn wait(wait: &LooseWait) -> pb::Wait {
    let (timeout_at, timeout_in_ms, left_ms) = wait.timeout.unwrap_or_default();
    pb::Wait {
        line: Some(line(&wait.line)),
        frame: wait.frame.clone(),
        repeatable: wait.repeatable,
        left_ms,
        timeout_at,
        timeout_in_ms,
        silent: wait.silent,
    }
}

/// What a client has at nodes. `None`: it is not readable.
pub(super) fn pins(watch: Option<pb::Watch>, wait: Option<pb::Wait>) -> Option<Pins> {
    let watch = match watch {
        Some(watch) => Some(LooseWatch {
            shard_id: watch.shard_id,
            line: match watch.line {
                Some(line) => Some(read_line(line)?),
                None => None,
            },
        }),
        None => None,
    };
    let wait = match wait {
        Some(wait) => Some(LooseWait {
            line: read_line(wait.line?)?,
            frame: wait.frame,
            repeatable: wait.repeatable,
            timeout: (wait.left_ms > 0).then_some((
                wait.timeout_at,
                wait.timeout_in_ms,
                wait.left_ms,
            )),
            silent: wait.silent,
            ticket: None,
        }),
        None => None,
    };
    Some(Pins { watch, wait })
}

fn read_line(line: pb::Line) -> Option<LooseLine> {
    Some(LooseLine {
        shard_id: line.shard_id,
        epoch: line.epoch,
        db: u16::try_from(line.database).ok()?,
        protocol: if line.resp3 {
            Protocol::Resp3
        } else {
            Protocol::Resp2
        },
        own_replies: line.own_replies,
        node_id: Some(line.node_id).filter(|id| *id != 0),
        input: line.input,
        output: line.output,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_is_read_back() {
        let told = LooseLine {
            shard_id: "s1".to_owned(),
            epoch: 7,
            db: 3,
            protocol: Protocol::Resp3,
            own_replies: 2,
            node_id: Some(99),
            input: b"*2\r\n".to_vec(),
            output: vec![0xff],
        };
        for (line, timeout) in [(Some(told.clone()), Some((2, true, 40))), (None, None)] {
            let line_is_told = line.is_some();
            let pins_told = Pins {
                watch: Some(LooseWatch {
                    shard_id: "s1".to_owned(),
                    line,
                }),
                wait: Some(LooseWait {
                    line: told.clone(),
                    frame: b"x".to_vec(),
                    repeatable: true,
                    timeout,
                    silent: line_is_told,
                    ticket: None,
                }),
            };
            let watch = pins_told.watch.as_ref().map(watch);
            let wait = pins_told.wait.as_ref().map(wait);
            assert_eq!(pins(watch, wait), Some(pins_told));
        }
        assert_eq!(pins(None, Some(pb::Wait::default())), None);
    }
}
