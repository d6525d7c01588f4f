//! Glob patterns as Redis matches them: KEYS, SCAN, PSUBSCRIBE, ACL, CONFIG GET.
//!
//! Invariant: every pattern and text gives an answer in time that is at most the product of their
//! lengths, without recursion: of several stars only the last is ever tried again.

/// Whether `text` matches `pattern`.
#[must_use]
pub fn matches(pattern: &[u8], text: &[u8]) -> bool {
    run(pattern, text, |byte| byte)
}

/// As [`matches()`], without regard to the case of ASCII letters.
#[must_use]
pub fn matches_nocase(pattern: &[u8], text: &[u8]) -> bool {
    run(pattern, text, |byte| byte.to_ascii_lowercase())
}

/// Most stars, each in a place of its own, that Redis follows; a pattern with more matches nothing.
const STARS_MAX: usize = 1000;

fn run(pattern: &[u8], text: &[u8], fold: impl Fn(u8) -> u8 + Copy) -> bool {
    let (mut at, mut from) = (0, 0);
    // Behind the last star: where the pattern goes on, and where in the text it was tried last. What an
    // earlier star took need not change: a longer match of it would only leave less text.
    let mut star = None;
    let mut stars = 0;
    while from < text.len() {
        if pattern.get(at) == Some(&b'*') {
            while pattern.get(at) == Some(&b'*') {
                at += 1;
            }
            if at == pattern.len() {
                return true;
            }
            stars += 1;
            if stars > STARS_MAX {
                return false;
            }
            star = Some((at, from));
            continue;
        }
        if let Some(next) = step(&pattern[at..], text[from], fold) {
            at += next;
            from += 1;
            continue;
        }
        let Some((behind, tried)) = star else {
            return false;
        };
        star = Some((behind, tried + 1));
        (at, from) = (behind, tried + 1);
    }
    // Redis takes stars at the end for nothing only if something came before them.
    let rest = &pattern[at..];
    rest.is_empty() || (!text.is_empty() && rest.iter().all(|&byte| byte == b'*'))
}

/// How much of the pattern's beginning takes `byte`; `None` if it does not.
fn step(pattern: &[u8], byte: u8, fold: impl Fn(u8) -> u8 + Copy) -> Option<usize> {
    match *pattern.first()? {
        b'?' => Some(1),
        b'[' => class(pattern, byte, fold),
        b'\\' if pattern.len() >= 2 => (fold(pattern[1]) == fold(byte)).then_some(2),
        literal => (fold(literal) == fold(byte)).then_some(1),
    }
}

/// `[a-z]`, `[^abc]`; one that is not closed ends with the pattern.
fn class(pattern: &[u8], byte: u8, fold: impl Fn(u8) -> u8 + Copy) -> Option<usize> {
    let mut at = 1;
    let not = pattern.get(at) == Some(&b'^');
    at += usize::from(not);
    let mut found = false;
    let end = loop {
        match pattern.get(at..).unwrap_or_default() {
            [] => break at,
            // What is escaped is not folded.
            [b'\\', escaped, ..] => {
                found |= *escaped == byte;
                at += 2;
            }
            [b']', ..] => break at + 1,
            [start, b'-', end, ..] => {
                // Sorted first and folded then, and as C's signed bytes, so that `[Z-a]` is what it is
                // in Redis.
                let (start, end) = (*start as i8, *end as i8);
                let (low, high) = (start.min(end) as u8, start.max(end) as u8);
                found |= (fold(low) as i8..=fold(high) as i8).contains(&(fold(byte) as i8));
                at += 3;
            }
            [one, ..] => {
                found |= fold(*one) == fold(byte);
                at += 1;
            }
        }
    };
    (found != not).then_some(end)
}
