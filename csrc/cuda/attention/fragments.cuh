// SPDX-License-Identifier: Apache-2.0
// The tile product on CUDA, for one warp: rows times a tile of 64 rows in shared memory, in two forms. Half precision
// goes through the tensor cores (mma.sync), float32 through FMAs, exactly; both leave the results with the same lanes.
//
// A warp has 16 * kBlocks rows. Of rows 16 m + g and 16 m + g + 8, with g = lane / 4, a lane holds columns 8 n + 2 t
// and the next, t = lane % 4: x[m][n][0], [1] of the first row, [2], [3] of the second. Each number is one chain of
// additions in one order, whatever row of whichever warp it is in.
#pragma once

#include "device.cuh"

namespace pycore {
namespace {

constexpr int kTile = static_cast<int>(kKeyTile);

// Rows in shared memory are 16 bytes longer than their channels, so that neighbours lie in different banks.
template <class T>
PYCORE_HOST_DEVICE constexpr int row_stride(int channels) {
  return channels + 16 / static_cast<int>(sizeof(T));
}

template <int kBlocks, int kTiles>
__device__ void clear(float (&x)[kBlocks][kTiles][4]) {
  PYCORE_UNROLL
  for (int m = 0; m < kBlocks; ++m) {
    PYCORE_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      PYCORE_UNROLL
      for (int k = 0; k < 4; ++k) x[m][n][k] = 0;
    }
  }
}

struct alignas(16) FourFloats {
  float x[4];
};
struct alignas(8) TwoFloats {
  float x[2];
};

// products[row][r] = sum over channels of rows[row][c] * tile[r][c]. `rows` are the warp's own.
template <class T, int kChannels, int kBlocks>
struct RowsTimesTile {
  static constexpr int kStride = row_stride<T>(kChannels);

  static __device__ void run(float (&products)[kBlocks][8][4], const T* rows, const T* tile) {
    const int lane = threadIdx.x % kLanes;
    clear(products);
    const SharedAddress row = shared_address(rows + lane % 16 * kStride + lane / 16 * 8);
    const SharedAddress column = shared_address(tile + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8);
    PYCORE_UNROLL
    for (int c = 0; c < kChannels; c += 16) {
      uint32_t left[kBlocks][4];
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) load_matrix<false>(left[m], row, 2 * (16 * m * kStride + c));
      PYCORE_UNROLL
      for (int n = 0; n < 4; ++n) {
        uint32_t right[4];
        load_matrix<false>(right, column, 2 * (16 * n * kStride + c));
        PYCORE_UNROLL
        for (int m = 0; m < kBlocks; ++m) {
          mma<T>(products[m][2 * n], left[m], right[0], right[1]);
          mma<T>(products[m][2 * n + 1], left[m], right[2], right[3]);
        }
      }
    }
  }
};

template <int kChannels, int kBlocks>
struct RowsTimesTile<float, kChannels, kBlocks> {
  static constexpr int kStride = row_stride<float>(kChannels);

  static __device__ void run(float (&products)[kBlocks][8][4], const float* rows, const float* tile) {
    const int lane = threadIdx.x % kLanes;
    clear(products);
    const float* row = rows + lane / 4 * kStride;
    const float* column = tile + lane % 4 * 2 * kStride;
    PYCORE_UNROLL_BY(2)
    for (int c = 0; c < kChannels; c += 4) {
      FourFloats left[kBlocks][2];
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        PYCORE_UNROLL
        for (int half = 0; half < 2; ++half) {
          left[m][half] = *reinterpret_cast<const FourFloats*>(row + (16 * m + 8 * half) * kStride + c);
        }
      }
      PYCORE_UNROLL
      for (int n = 0; n < 8; ++n) {
        PYCORE_UNROLL
        for (int k = 0; k < 2; ++k) {
          const FourFloats right = *reinterpret_cast<const FourFloats*>(column + (8 * n + k) * kStride + c);
          PYCORE_UNROLL
          for (int i = 0; i < 4; ++i) {
            PYCORE_UNROLL
            for (int m = 0; m < kBlocks; ++m) {
              products[m][n][k] = fmaf(left[m][0].x[i], right.x[i], products[m][n][k]);
              products[m][n][2 + k] = fmaf(left[m][1].x[i], right.x[i], products[m][n][2 + k]);
            }
          }
        }
      }
    }
  }
};

// sums[row][c] += sum over r of weights[row][r] * tile[r][c]. The weights are rounded to T.
template <class T, int kChannels, int kBlocks>
struct WeightsTimesTile {
  static constexpr int kStride = row_stride<T>(kChannels);

  static __device__ void run(float (&sums)[kBlocks][kChannels / 8][4], float (&weights)[kBlocks][8][4], const T* tile) {
    const int lane = threadIdx.x % kLanes;
    const SharedAddress rows = shared_address(tile + lane % 16 * kStride + lane / 16 * 8);
    PYCORE_UNROLL
    for (int k = 0; k < 4; ++k) {
      uint32_t weight[kBlocks][4];
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        const float (&low)[4] = weights[m][2 * k], (&high)[4] = weights[m][2 * k + 1];
        weight[m][0] = pack<T>(low[0], low[1]);
        weight[m][1] = pack<T>(low[2], low[3]);
        weight[m][2] = pack<T>(high[0], high[1]);
        weight[m][3] = pack<T>(high[2], high[3]);
      }
      PYCORE_UNROLL
      for (int n = 0; n < kChannels / 16; ++n) {
        uint32_t value[4];
        load_matrix<true>(value, rows, 2 * (16 * k * kStride + 16 * n));
        PYCORE_UNROLL
        for (int m = 0; m < kBlocks; ++m) {
          mma<T>(sums[m][2 * n], weight[m], value[0], value[1]);
          mma<T>(sums[m][2 * n + 1], weight[m], value[2], value[3]);
        }
      }
    }
  }
};

// A row's weights lie with four lanes, which lend them to each other. Eight rows of the tile at a time: what is used
// moves to the end of the array, because registers have no index, and after the eighth round all is where it was.
template <int kChannels, int kBlocks>
struct WeightsTimesTile<float, kChannels, kBlocks> {
  static constexpr int kStride = row_stride<float>(kChannels);

  static __device__ void run(float (&sums)[kBlocks][kChannels / 8][4], float (&weights)[kBlocks][8][4],
                             const float* tile) {
    const int lane = threadIdx.x % kLanes, first_of_row = lane / 4 * 4;
    const float* rows = tile + lane % 4 * 2;
    PYCORE_UNROLL_BY(1)
    for (int round = 0; round < 8; ++round, rows += 8 * kStride) {
      PYCORE_UNROLL
      for (int r = 0; r < 8; ++r) {
        float weight[kBlocks][2];
        PYCORE_UNROLL
        for (int m = 0; m < kBlocks; ++m) {
          PYCORE_UNROLL
          for (int half = 0; half < 2; ++half) {
            weight[m][half] = __shfl_sync(kAllLanes, weights[m][0][2 * half + r % 2], first_of_row + r / 2);
          }
        }
        PYCORE_UNROLL
        for (int n = 0; n < kChannels / 8; ++n) {
          const TwoFloats value = *reinterpret_cast<const TwoFloats*>(rows + r * kStride + 8 * n);
          PYCORE_UNROLL
          for (int m = 0; m < kBlocks; ++m) {
            PYCORE_UNROLL
            for (int k = 0; k < 4; ++k) sums[m][n][k] = fmaf(weight[m][k / 2], value.x[k % 2], sums[m][n][k]);
          }
        }
      }
      PYCORE_UNROLL
      for (int m = 0; m < kBlocks; ++m) {
        PYCORE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float used = weights[m][0][k];
          PYCORE_UNROLL
          for (int n = 0; n < 7; ++n) weights[m][n][k] = weights[m][n + 1][k];
          weights[m][7][k] = used;
        }
      }
    }
  }
};

}  // namespace
}  // namespace pycore
