//! Which clients CLIENT LIST and CLIENT KILL mean.
//!
//! Invariant: read once where the command is given, and again, from the same words, by each worker
//! that looks at its clients; so what one refuses no other sees.

use std::net::SocketAddr;

use slotmesh_resp::parse_i64;

use super::client::Client;

/// What a client is for, in Redis's words. `master` and `replica` are known words that fit nobody.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClientType {
    Normal,
    PubSub,
    Master,
    Replica,
}

impl ClientType {
    pub(super) fn read(word: &[u8]) -> Result<Self, Vec<u8>> {
        Ok(match word.to_ascii_lowercase().as_slice() {
            b"normal" => Self::Normal,
            b"pubsub" => Self::PubSub,
            b"master" => Self::Master,
            b"replica" | b"slave" => Self::Replica,
            _ => {
                let word = String::from_utf8_lossy(word);
                return Err(format!("ERR Unknown client type '{word}'").into_bytes());
            }
        })
    }

    pub(super) fn of(client: &Client) -> Self {
        if client.is_subscriber() {
            Self::PubSub
        } else {
            Self::Normal
        }
    }
}

const SYNTAX: &[u8] = b"ERR syntax error";

/// All that is asked must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filter {
    ids: Option<Vec<u64>>,
    kind: Option<ClientType>,
    user: Option<Vec<u8>>,
    peer: Option<Vec<u8>>,
    local: Option<Vec<u8>>,
    min_age_s: Option<u64>,
    /// KILL spares the client that asks, unless it says otherwise.
    pub(super) skip_me: bool,
    /// `CLIENT KILL addr:port`: one client or an error.
    pub(super) old_form: bool,
}

impl Filter {
    /// The words after CLIENT LIST.
    pub(super) fn of_list(words: &[&[u8]]) -> Result<Self, Vec<u8>> {
        let mut filter = Self::default();
        match words {
            [] => {}
            [option, kind] if option.eq_ignore_ascii_case(b"type") => {
                filter.kind = Some(ClientType::read(kind)?);
            }
            [option, ids @ ..] if option.eq_ignore_ascii_case(b"id") && !ids.is_empty() => {
                let id = |word: &&[u8]| parse_i64(word).filter(|id| *id > 0).map(|id| id as u64);
                let ids: Option<Vec<u64>> = ids.iter().map(id).collect();
                filter.ids = Some(ids.ok_or(&b"ERR Invalid client ID"[..])?);
            }
            _ => return Err(SYNTAX.to_vec()),
        }
        Ok(filter)
    }

    /// The words after CLIENT KILL.
    pub(super) fn of_kill(words: &[&[u8]]) -> Result<Self, Vec<u8>> {
        let mut filter = Self {
            skip_me: true,
            ..Self::default()
        };
        if let [address] = words {
            filter.peer = Some(address.to_vec());
            filter.old_form = true;
            filter.skip_me = false;
            return Ok(filter);
        }
        if !words.len().is_multiple_of(2) {
            return Err(SYNTAX.to_vec());
        }
        for pair in words.chunks_exact(2) {
            let value = pair[1];
            match pair[0].to_ascii_lowercase().as_slice() {
                b"id" => {
                    let id = parse_i64(value).filter(|id| *id > 0);
                    let id = id.ok_or(&b"ERR client-id should be greater than 0"[..])?;
                    filter.ids = Some(vec![id as u64]);
                }
                b"maxage" => {
                    let age = parse_i64(value).filter(|age| *age > 0);
                    let age = age.ok_or(&b"ERR maxage is not an integer or out of range"[..])?;
                    filter.min_age_s = Some(age as u64);
                }
                b"type" => filter.kind = Some(ClientType::read(value)?),
                b"addr" => filter.peer = Some(value.to_vec()),
                b"laddr" => filter.local = Some(value.to_vec()),
                b"user" => filter.user = Some(value.to_vec()),
                b"skipme" if value.eq_ignore_ascii_case(b"yes") => filter.skip_me = true,
                b"skipme" if value.eq_ignore_ascii_case(b"no") => filter.skip_me = false,
                _ => return Err(SYNTAX.to_vec()),
            }
        }
        Ok(filter)
    }

    /// The user that is asked for, so that it can be checked whether there is one.
    pub(super) fn user(&self) -> Option<&[u8]> {
        self.user.as_deref()
    }

    /// True if the client is meant.
    pub(super) fn matches(&self, client: &Client, now_ms: u64) -> bool {
        let shown = |address: Option<SocketAddr>| address.map(|a| a.to_string().into_bytes());
        let state = &client.state;
        let age_s = now_ms.saturating_sub(state.connected_unix_ms) / 1000;
        (self.ids.as_ref()).is_none_or(|ids| ids.contains(&state.id))
            && self.kind.is_none_or(|kind| kind == ClientType::of(client))
            && (self.user.as_deref()).is_none_or(|user| user == state.user().as_bytes())
            && (self.peer.is_none() || self.peer == shown(state.peer))
            && (self.local.is_none() || self.local == shown(client.local))
            && self.min_age_s.is_none_or(|min| age_s >= min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::client::ClientState;

    fn words(text: &str) -> Vec<&[u8]> {
        text.split_whitespace().map(str::as_bytes).collect()
    }

    fn refusal(read: Result<Filter, Vec<u8>>) -> String {
        String::from_utf8(read.unwrap_err()).unwrap()
    }

    #[test]
    fn what_is_asked_for_must_hold_all_together() {
        let peer = Some("127.0.0.1:5000".parse().unwrap());
        let client = Client::new(ClientState::new(7, peer, 1_000), 1);
        let matches = |text: &str| {
            let filter = Filter::of_kill(&words(text)).unwrap();
            filter.matches(&client, 11_000)
        };
        for fits in [
            "id 7",
            "127.0.0.1:5000",
            "type normal addr 127.0.0.1:5000",
            "user default skipme no",
            "maxage 10",
        ] {
            assert!(matches(fits), "{fits}");
        }
        for fails in [
            "id 8",
            "type pubsub",
            "id 7 user other",
            "maxage 11",
            "type replica",
        ] {
            assert!(!matches(fails), "{fails}");
        }
        assert!(
            Filter::of_list(&words("id 6 7"))
                .unwrap()
                .matches(&client, 0)
        );
    }

    #[test]
    fn nonsense_is_refused_in_the_words_of_redis() {
        for (text, want) in [
            ("id 0", "ERR client-id should be greater than 0"),
            ("foo bar", "ERR syntax error"),
            ("id 1 addr", "ERR syntax error"),
            ("skipme x", "ERR syntax error"),
            ("type foo", "ERR Unknown client type 'foo'"),
        ] {
            assert_eq!(refusal(Filter::of_kill(&words(text))), want, "{text}");
        }
        for (text, want) in [
            ("id x", "ERR Invalid client ID"),
            ("id", "ERR syntax error"),
            ("type", "ERR syntax error"),
        ] {
            assert_eq!(refusal(Filter::of_list(&words(text))), want, "{text}");
        }
    }
}
