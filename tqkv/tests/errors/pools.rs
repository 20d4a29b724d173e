//! Pools, memory of others, batches.

use super::*;

#[test]
fn pools() {
    let device = Device::cpu();
    let new = |kv_heads, page_size, pages| PagePool::new(&device, row(), kv_heads, page_size, pages).map(|_| ());
    assert_eq!(new(0, 8, 1), Err(zero("kv_heads")));
    assert_eq!(new(2, 0, 1), Err(zero("page_size")));
    assert_eq!(new(2, 8, 0), Err(zero("pages")));
    let max = usize::MAX;
    for (kv_heads, page_size, pages) in [(max, 8, 1), (2, max, 1), (2, 8, max), (max, max, max), (1 << 32, 1 << 32, 1)]
    {
        assert_eq!(new(kv_heads, page_size, pages), Err(overflow("rows of a pool", "isize")));
    }
    assert_eq!(new(1 << 16, 1 << 16, 1), Err(overflow("rows of a pool", "u32")));
    assert_eq!(new(1 << 13, 1 << 14, 1), Err(overflow("bytes of a page", "u32")));

    let scales = device.zeros(DType::F16, &[1, 2, 8, 1]).unwrap();
    let codes = device.zeros(DType::U8, &[1, 2, 8, 32]).unwrap();
    let from = |row, codes: &Buffer, scales: Option<&Buffer>| PagePool::from_buffers(row, codes, scales).map(|_| ());
    assert_eq!(from(row(), &codes, Some(&scales)), Ok(()));
    let flat = codes.reshape(&[512]).unwrap();
    let want = shape("codes", &[512], "[pages, kv_heads, page_size, row_bytes]");
    assert_eq!(from(row(), &flat, Some(&scales)), Err(want));
    let five = RowFormat::new(Codec::tq(5), D).unwrap();
    assert_eq!(from(five, &codes, Some(&scales)), Err(shape("codes", &[1, 2, 8, 32], "[1, 2, 8, 40]")));
    let floats = device.zeros(DType::F32, &[1, 2, 8, 32]).unwrap();
    let want = Error::DType { what: "codes", got: "f32", expected: "u8" };
    assert_eq!(from(row(), &floats, Some(&scales)), Err(want));
    assert_eq!(from(row(), &codes, None), Err(shape("scales", &[], "[1, 2, 8, 1]")));
    let two = device.zeros(DType::F16, &[1, 2, 8, 2]).unwrap();
    assert_eq!(from(row(), &codes, Some(&two)), Err(shape("scales", &[1, 2, 8, 2], "[1, 2, 8, 1]")));
    let wide = device.zeros(DType::F32, &[1, 2, 8, 1]).unwrap();
    let want = Error::DType { what: "scales", got: "f32", expected: "f16" };
    assert_eq!(from(row(), &codes, Some(&wide)), Err(want));
    let seed = RowFormat::new(Codec::seed(4), D).unwrap();
    let want = Error::DType { what: "scales", got: "f16", expected: "f32" };
    assert_eq!(from(seed, &codes, Some(&scales)), Err(want));
    let far = Device::cpu_with_threads(1).unwrap().zeros(DType::F16, &[1, 2, 8, 1]).unwrap();
    let want =
        Error::WrongDevice { what: "scales", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    assert_eq!(from(row(), &codes, Some(&far)), Err(want));

    let dense = RowFormat::new(Codec::F16, 16).unwrap();
    let codes = device.zeros(DType::U8, &[1, 2, 8, 32]).unwrap();
    let want = shape("scales", &[1, 2, 8, 1], "none: dense floats have no scales");
    assert_eq!(from(dense, &codes, Some(&scales)), Err(want));
    let odd = device.zeros(DType::U8, &[33]).unwrap().slice(1..33).unwrap().reshape(&[1, 1, 1, 32]).unwrap();
    let want = mismatch("byte offset of codes", 1, "a multiple of 2, so that floats are aligned");
    assert_eq!(from(dense, &odd, None), Err(want));
    for (shape, what) in [([0, 2, 8, 32], "pages"), ([1, 0, 8, 32], "kv_heads"), ([1, 2, 0, 32], "page_size")] {
        assert_eq!(from(dense, &device.zeros(DType::U8, &shape).unwrap(), None), Err(zero(what)));
    }
}

#[test]
fn strided_pools() {
    let device = Device::cpu();
    let (row, bytes) = (row(), row().bytes());
    let memory = device.zeros(DType::U8, &[3 * 16 * bytes]).unwrap();
    let dense = Strides::dense(2, 8, bytes);
    let from = |at: usize| memory.slice(at..memory.len()).unwrap();
    fn pool(row: RowFormat, codes: (&Buffer, Strides), scales: Option<(&Buffer, Strides)>) -> tqkv::Result<PagePool> {
        PagePool::strided(row, [3, 2, 8], codes, scales)
    }
    let (codes, scales) = (from(0), from(32));
    fn fails(want: Error, codes: (&Buffer, Strides), scales: Option<(&Buffer, Strides)>) {
        assert_eq!(pool(self::row(), codes, scales).map(|_| ()), Err(want));
    }
    let beside = pool(row, (&codes, dense), Some((&scales, dense))).unwrap();
    assert_eq!(
        (beside.bytes(), beside.codes().bytes(), beside.strides()),
        (48 * bytes, 48 * bytes - 2, (dense, dense))
    );

    let overlap = |got, least| {
        mismatch("stride of codes", got, &format!("at least {least}, as what it steps over takes so many bytes"))
    };
    fails(overlap(31, 32), (&codes, Strides { row: 31, ..dense }), Some((&scales, dense)));
    fails(overlap(263, 270), (&codes, Strides { head: 263, ..dense }), Some((&scales, dense)));
    fails(overlap(0, 32), (&codes, Strides::default()), Some((&scales, dense)));
    let far = Strides { page: usize::MAX / 2, ..dense };
    fails(overflow("stride of codes", "isize"), (&codes, far), Some((&scales, dense)));
    let small = |what, got, expected| Error::TooSmall { what, got, expected };
    let short = memory.slice(0..48 * bytes - 3).unwrap();
    fails(small("codes", 48 * bytes - 3, 48 * bytes - 2), (&short, dense), Some((&scales, dense)));
    let late = from(33);
    fails(small("scales", 48 * bytes - 33, 48 * bytes - 32), (&codes, dense), Some((&late, dense)));
    fails(Error::Aliased { what: "scales" }, (&codes, dense), Some((&from(30), dense)));
    fails(shape("scales", &[], "[3, 2, 8, 1]"), (&codes, dense), None);
    // f16 scales at an odd byte, or an odd number of bytes apart.
    let odd = Strides::dense(2, 8, 33);
    let want = mismatch("stride of scales", 33, "a multiple of 2, so that floats are aligned");
    let other = device.zeros(DType::U8, &[48 * 33]).unwrap();
    fails(want, (&codes, dense), Some((&other, odd)));
    let want = mismatch("byte offset of scales", 1, "a multiple of 2, so that floats are aligned");
    fails(want, (&codes, dense), Some((&other.slice(1..97).unwrap(), Strides::dense(2, 8, 2))));
    let elsewhere = Device::cpu_with_threads(1).unwrap().zeros(DType::U8, &[48 * bytes]).unwrap();
    let want =
        Error::WrongDevice { what: "scales", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    fails(want, (&codes, dense), Some((&elsewhere, dense)));
    let f16 = RowFormat::new(Codec::F16, 16).unwrap();
    let none = shape("scales", scales.shape(), "none: dense floats have no scales");
    assert_eq!(pool(f16, (&codes, dense), Some((&scales, dense))).map(|_| ()), Err(none));
    let want = mismatch("stride of codes", 33, "a multiple of 2, so that floats are aligned");
    assert_eq!(pool(f16, (&codes, odd), None).map(|_| ()), Err(want));

    // Two pools may lie between each other, but no row within another.
    let twice = Strides { row: 2 * bytes, head: 16 * bytes, page: 32 * bytes };
    let memory = device.zeros(DType::U8, &[3 * 32 * bytes]).unwrap();
    let side = |at: usize| {
        let from = |at| memory.slice(at..memory.len()).unwrap();
        pool(row, (&from(at), twice), Some((&from(at + 32), twice))).unwrap()
    };
    let (key, value, shifted) = (side(0), side(bytes), side(2));
    assert!(!key.overlaps(&value) && key.overlaps(&shifted) && value.overlaps(&shifted) && key.overlaps(&key));
    let x = device.upload(&[1f32; 2 * D], &[1, 2, D]).unwrap();
    let batch = Batch::contiguous(&device, 8, 0, 1, 1).unwrap();
    let mut encoder = device.encoder().unwrap();
    quantize(&mut encoder, &[(&x, &key), (&x, &value)], &batch).unwrap();
    let aliased = Err(Error::Aliased { what: "pool" });
    assert_eq!(quantize(&mut encoder, &[(&x, &key), (&x, &shifted)], &batch), aliased);
    encoder.submit_and_wait().unwrap();
}

#[test]
fn strides_on_gpus() {
    for device in ["wgpu", "cuda"].into_iter().filter_map(device) {
        let (row, bytes) = (row(), row().bytes());
        let memory = device.zeros(DType::U8, &[48 * bytes]).unwrap();
        let strides = Strides::dense(2, 8, bytes);
        let apart = device.zeros(DType::F16, &[48]).unwrap();
        let beside = (&apart, Strides::dense(2, 8, 2));
        let what = format!("read a pool of {:?}, only one without gaps", (strides, beside.1));
        let want = Error::Unsupported { device: device.to_string(), what };
        assert_eq!(PagePool::strided(row, [3, 2, 8], (&memory, strides), Some(beside)).map(|_| ()), Err(want));
        let pool = PagePool::strided(row, [3, 2, 8], (&memory, Strides::dense(2, 8, 32)), Some(beside)).unwrap();
        assert_eq!((pool.codes().shape(), pool.scales().unwrap().shape()), (&[3, 2, 8, 32][..], &[3, 2, 8, 1][..]));
        // SAFETY: refused before it is looked at.
        let borrowed = unsafe { Buffer::from_host_ptr(&device, 64 as *mut u8, DType::F32, &[2], Box::new(())) };
        let what = "wrap memory of the host".to_owned();
        assert_eq!(borrowed.map(|_| ()), Err(Error::Unsupported { device: device.to_string(), what }));
    }
}

#[test]
fn borrowed_memory() {
    let device = Device::cpu();
    let mut own = [0f32; 8];
    let start = own.as_mut_ptr().cast::<u8>();
    // SAFETY: within `own`, which nobody else touches below.
    let borrow =
        |at: *mut u8, shape: &[usize]| unsafe { Buffer::from_host_ptr(&device, at, DType::F32, shape, Box::new(())) };
    let address = |got| mismatch("address of host memory", got, "not null and a multiple of 4");
    assert_eq!(borrow(std::ptr::null_mut(), &[2]).map(|_| ()), Err(address(0)));
    let odd = start.wrapping_add(2);
    assert_eq!(borrow(odd, &[2]).map(|_| ()), Err(address(odd.addr())));
    assert_eq!(borrow(start, &[usize::MAX, 2]).map(|_| ()), Err(overflow("buffer size", "isize")));

    // Two views of one memory that know nothing of each other.
    let (all, half) = (borrow(start, &[8]).unwrap(), borrow(start.wrapping_add(16), &[4]).unwrap());
    assert!(all.overlaps(&half) && !all.shares_memory(&half) && !all.slice(0..4).unwrap().overlaps(&half));
    let mut encoder = device.encoder().unwrap();
    assert_eq!(copy(&mut encoder, &all.slice(1..5).unwrap(), &half), Err(Error::Aliased { what: "to" }));
    all.slice(0..4).unwrap().write(&[1f32, 2.0, 3.0, 4.0]).unwrap();
    copy(&mut encoder, &all.slice(0..4).unwrap(), &half).unwrap();
    encoder.submit_and_wait().unwrap();
    drop((all, half));
    assert_eq!(own, [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn batches() {
    let device = Device::cpu();
    let new = |page_size, spans: &[Span]| Batch::new(&device, page_size, spans).map(|_| ());
    let span = |first, len, new| Span { first, len, new, pages: &[0, 1] };
    let max = usize::MAX;
    assert_eq!(new(0, &[span(0, 1, 1)]), Err(zero("page_size")));
    assert_eq!(new(PAGE, &[]), Err(zero("sequences of a batch")));
    let too_large = |what, got, expected| Error::TooLarge { what, got, expected };
    assert_eq!(new(PAGE, &[span(0, 3, 4)]), Err(too_large("new positions of a sequence", 4, 3)));
    assert_eq!(new(PAGE, &[span(2, 3, 2)]), Err(too_large("new positions of a sequence", 2, 1)));
    assert_eq!(new(PAGE, &[span(0, 3, max)]), Err(too_large("new positions of a sequence", max, 3)));
    assert_eq!(new(PAGE, &[span(4, 3, 0)]), Err(too_large("first position of a sequence", 4, 3)));
    let positions = |start, end, first, len| Error::Positions { start, end, first, len };
    assert_eq!(new(PAGE, &[span(0, 17, 1)]), Err(positions(0, 17, 0, 16)));
    assert_eq!(new(PAGE, &[span(5, 22, 1)]), Err(positions(5, 22, 5, 21)));
    assert_eq!(new(PAGE, &[span(0, max, max)]), Err(positions(0, max, 0, 16)));
    // The second table is shorter than the first, so it is no ring.
    let short = Span { first: 3, len: 9, new: 0, pages: &[2] };
    assert_eq!(new(PAGE, &[span(0, 1, 1), short]), Err(positions(3, 9, 0, 8)));
    let none = Span { first: 0, len: 1, new: 1, pages: &[] };
    assert_eq!(new(PAGE, &[none]), Err(positions(0, 1, 0, 0)));

    let hole = |first, len| Span { first, len, new: 0, pages: &[0, NO_PAGE] };
    let no_page = Error::Page { got: NO_PAGE as usize, pages: NO_PAGE as usize };
    assert_eq!(new(PAGE, &[hole(0, 9)]), Err(no_page.clone()));
    assert_eq!(new(PAGE, &[hole(8, 10)]), Err(no_page));
    assert_eq!(new(PAGE, &[hole(0, 8), hole(9, 9), hole(16, 24)]), Ok(()));

    // Positions end where kernels can still count, slots at 2^32 - 1.
    let last = 0x7fff_0000;
    assert_eq!(new(PAGE, &[span(last - 2, last, 2)]), Ok(()));
    for len in [last + 1, u32::MAX as usize, max] {
        assert_eq!(new(PAGE, &[span(len - 2, len, 2)]), Err(too_large("length of a sequence", len, last)));
    }
    assert_eq!(new(max, &[span(0, 1, 1)]), Err(overflow("slots of a sequence", "isize")));
    assert_eq!(new(1 << 31, &[span(0, 1, 1)]), Err(overflow("slots of a sequence", "u32")));
    let half = 1 << 30;
    let spans: Vec<_> = (0..4).map(|_| span(0, half, half)).collect();
    assert_eq!(new(half, &spans), Err(overflow("tokens of a batch", "u32")));
    assert_eq!(Batch::contiguous(&device, 0, 0, 1, 1).map(|_| ()), Err(zero("page_size")));
    assert_eq!(Batch::contiguous(&device, max, 0, 1, 1).map(|_| ()), Err(overflow("slots of a sequence", "isize")));
}
