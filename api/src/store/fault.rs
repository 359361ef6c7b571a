//! What a store answers when it does not do what was asked, in words for people and with what follows for us.

use std::error::Error as _;
use std::fmt;

use jiff::Timestamp;
use object_store::Error;

use super::trouble::Trouble;

/// A store did not do it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What kind of fault it is.
    pub trouble: Trouble,
    /// What was asked of which object.
    pub asked: String,
    /// For people: what came back, and what to do where that is known.
    pub why: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "could not {}: {}", self.asked, self.why)
    }
}

impl std::error::Error for Fault {}

/// Characters of what a store says that are shown.
const SAID_MAX: usize = 300;

impl Fault {
    /// One that this side found.
    pub(super) fn new(trouble: Trouble, asked: impl Into<String>, why: impl Into<String>) -> Self {
        Self { trouble, asked: asked.into(), why: why.into() }
    }

    /// From what the store answered. `who`: whose credentials it was asked with.
    pub(super) fn from_store(asked: String, error: &Error, who: &str, bucket: &str) -> Self {
        let said = all_of(error);
        let status = status_of(&said);
        let code = between(&said, "<Code>", "</Code>").unwrap_or_default();
        let trouble = trouble_of(error, &said, status, code);
        let message = between(&said, "<Message>", "</Message>").map(str::to_string);
        let mut short = match (status, code, message) {
            (Some(status), "", None) => format!("it answered {status}"),
            (Some(status), code, message) => format!("it answered {status} {code}: {}", message.unwrap_or_default()),
            (None, ..) => last_of(error),
        };
        short = short.chars().map(|c| if c.is_control() { ' ' } else { c }).take(SAID_MAX).collect();
        let why = match trouble {
            Trouble::Credentials => format!("{who} was not accepted: {short}"),
            Trouble::Clock => format!("this machine's clock is off by {}: have a time service set it right ({short})", skew(&said)),
            Trouble::Denied => format!("{who} may not do this: {short}"),
            Trouble::NoBucket => format!("there is no bucket `{bucket}`: {short}"),
            Trouble::Full => format!("there is no room: {short}"),
            _ => short,
        };
        Self { trouble, asked, why }
    }
}

/// How far the clock here is from the store's, by what it says of both.
fn skew(said: &str) -> String {
    let at = |from, to| between(said, from, to).and_then(|text| text.parse::<Timestamp>().ok());
    match (at("<RequestTime>", "</RequestTime>"), at("<ServerTime>", "</ServerTime>")) {
        (Some(here), Some(there)) => {
            let seconds = here.duration_since(there).as_secs();
            let which = if seconds < 0 { "behind" } else { "ahead of" };
            format!("{} s, {which} the store's", seconds.unsigned_abs())
        }
        _ => "more than the store allows".into(),
    }
}

fn trouble_of(error: &Error, said: &str, status: Option<u16>, code: &str) -> Trouble {
    let any = |words: &[&str]| words.iter().any(|word| said.contains(word));
    match code {
        "NoSuchBucket" | "ContainerNotFound" => return Trouble::NoBucket,
        "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "ExpiredToken" | "InvalidToken" | "AuthenticationFailed" => {
            return Trouble::Credentials;
        }
        "RequestTimeTooSkewed" => return Trouble::Clock,
        "QuotaExceeded" | "XMinioStorageFull" | "InsufficientStorage" => return Trouble::Full,
        _ => {}
    }
    match (error, status) {
        (Error::Unauthenticated { .. }, _) | (_, Some(401)) => Trouble::Credentials,
        (Error::PermissionDenied { .. }, _) | (_, Some(403)) => Trouble::Denied,
        (Error::AlreadyExists { .. } | Error::Precondition { .. }, _) | (_, Some(409 | 412)) => Trouble::Conflict,
        (Error::NotFound { .. }, _) | (_, Some(404)) => Trouble::NotFound,
        (_, Some(507)) => Trouble::Full,
        (_, Some(429 | 500 | 502 | 503 | 504)) => Trouble::Busy,
        _ if any(&["No space left on device", "os error 28", "Disk quota exceeded", "os error 122"]) => Trouble::Full,
        _ if any(&["Permission denied", "Read-only file system"]) => Trouble::Denied,
        _ if any(&["timed out", "TimedOut", "deadline has elapsed"]) => Trouble::TimedOut,
        _ if any(&["Token", "credential", "169.254.169.254", "metadata"]) => Trouble::Credentials,
        _ if any(&["connect", "Connection", "dns", "reset", "closed", "incomplete", "end of file", "IncompleteMessage"]) => {
            Trouble::Unreachable
        }
        _ => Trouble::Other,
    }
}

/// Everything that an error says, with its causes.
fn all_of(error: &Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        next = cause.source();
    }
    text
}

/// The last cause of an error, with the one before it.
fn last_of(error: &Error) -> String {
    let mut chain = vec![error.to_string()];
    let mut next = error.source();
    while let Some(cause) = next {
        chain.push(cause.to_string());
        next = cause.source();
    }
    let mut last: Vec<String> = chain.split_off(chain.len().saturating_sub(2));
    if last.len() == 2 && last[0].contains(&last[1]) {
        last.pop();
    }
    last.join(": ")
}

fn status_of(said: &str) -> Option<u16> {
    let rest = said.split_once("status code: ")?.1;
    rest.get(..3)?.parse().ok()
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    Some(text.split_once(from)?.1.split_once(to)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(body: &str) -> Fault {
        let source = format!("Server returned non-2xx status code: 403 Forbidden: {body}");
        let error = Error::PermissionDenied { path: "x".into(), source: source.into() };
        Fault::from_store("put x".into(), &error, "the test", "runs")
    }

    #[test]
    fn a_clock_that_is_off_is_told_as_such_and_tried_again() {
        let times = "<RequestTime>20261123T220000Z</RequestTime><ServerTime>2026-11-23T22:20:05Z</ServerTime>";
        let words = "<Code>RequestTimeTooSkewed</Code><Message>The difference is too large.</Message>";
        let fault = answered(&format!("<Error>{words}{times}</Error>"));
        assert_eq!((fault.trouble, fault.trouble.is_transient()), (Trouble::Clock, true));
        assert!(fault.why.starts_with("this machine's clock is off by 1205 s, behind the store's: have a time service"), "{fault}");
        let fault = answered(&format!("<Error>{words}<ServerTime>soon</ServerTime></Error>"));
        assert!(fault.why.contains("is off by more than the store allows"), "{fault}");
        assert_eq!(answered("<Error><Code>AccessDenied</Code></Error>").trouble, Trouble::Denied);
    }
}
